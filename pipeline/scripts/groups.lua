#!lua flags=allow-oom
-- groups: create a stage's group on each of its streams where it is missing.
-- KEYS[1..3] the stage's streams   ARGV[1] group
-- Returns: how many were created.
-- Invariant: a group begins at the beginning of its stream, so nothing is skipped. Memory may be full: a stage that
--   waited for room before it begins to work would wait for itself. Nobody holds an entry of a group that begins, so
--   the running places of its jobs are free: they would wait for themselves, too.
local function free_places(stream)
  if string.sub(stream, 1, #KEY.placed) ~= KEY.placed or not has_type(KEY.replicas, 'hash') then return end
  for _, url in ipairs(call('HKEYS', KEY.replicas)) do
    local key = KEY.running .. url
    if has_type(key, 'zset') then
      for _, id in ipairs(call('ZRANGE', key, 0, -1)) do
        if call('HGET', KEY.live .. id, 'stream') == stream then call('ZREM', key, id) end
      end
    end
  end
end

local created = 0
for _, stream in ipairs(KEYS) do
  check_type(stream, 'stream')
  local found = false
  if call('EXISTS', stream) == 1 then
    for _, row in ipairs(call('XINFO', 'GROUPS', stream)) do
      found = found or field_of(row, 'name') == ARGV[1]
    end
  end
  if not found then
    call('XGROUP', 'CREATE', stream, ARGV[1], '0', 'MKSTREAM')
    free_places(stream)
    created = created + 1
  end
end
return created
