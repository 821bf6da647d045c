#!lua flags=no-writes
-- envelope: a live job as it stands on its way.
-- ARGV[1] job id
-- Returns: {} when it does not live, else {'queued' | 'running', tenant, envelope ('' when its entry is gone), when it is
--   due (ms), '' when it is due already}.
local live = call('HMGET', KEY.live .. ARGV[1], 'entry', 'stream', 'tenant', 'body', 'record')
local entry, stream, tenant, body = live[1], live[2], live[3], live[4]
if not stream then return {} end
if entry == '' then
  local due = call('ZSCORE', KEY.delayed, ARGV[1])
  local batch = string.match(live[5] or '', '^message (.+)$')
  if not due and batch then due = call('HGET', KEY.batch .. batch, 'due_ms') end -- it has not entered yet
  return {'queued', tenant, body or '', due and due ~= '0' and due or ''}
end
local rows = call('XRANGE', stream, entry, entry)
local data = rows[1] and field_of(rows[1][2], 'data') or ''
return {pending(stream, group_of(stream), entry) and 'running' or 'queued', tenant, data, ''}
