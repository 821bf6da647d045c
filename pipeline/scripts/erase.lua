#!lua flags=allow-oom
-- erase: forget a person: their epoch, last input, cached reports, responses and outcomes; what is being written about
-- them is stopped and answered with `user_deleted`; the recorder is told.
-- ARGV[1] person (as it stands in keys)  ARGV[2] user id  ARGV[3] tenant  ARGV[4] life of a completion (ms)
-- ARGV[5] name of this erasure where the person has no epoch
-- Returns: time (us), epoch (or that name).
-- Invariant: what began before carries an epoch that is nobody's any more, so it can be stored nowhere afterwards.
local now_us = clock_us()
local owner, data = ARGV[1], KEY.user_data .. ARGV[1]
check_type(KEY.user .. owner, 'hash')
check_type(data, 'zset')
check_type(KEY.events, 'stream')
check_type(KEY.report_responses, 'stream')
local epoch = call('HGET', KEY.user .. owner, 'epoch') or ARGV[5]
local alive, found = {}, call('ZRANGE', data, 0, -1)
for _, row in ipairs(found) do
  local id = string.match(row, '^job (.*)$')
  local live = id and read_live(id)
  if live and live.report then alive[id] = live end
end
call('DEL', KEY.user .. owner, KEY.input .. owner, data)
for _, row in ipairs(found) do
  local kind, name = string.match(row, '^(%a+) (.*)$')
  if kind == 'response' then call('XDEL', KEY.report_responses, name) end
  if kind == 'report' then call('DEL', KEY.report .. name) end
  if kind == 'job' and not alive[name] then call('DEL', KEY.completion .. name) end
end
for id, live in pairs(alive) do cancel_live(id, live, ARGV[4], now_us) end
-- What history has of earlier epochs of theirs is older than an epoch's life at least, of which a minute is the least; so
-- nothing of one who comes back at once is taken for old, whatever the clock of who accepts it.
remember('erasure', epoch, ARGV[3], 0, now_us, '{"user_id":"' .. ARGV[2] .. '","before_ms":'
  .. digits(math.floor(now_us / 1000) - 60000) .. '}')
conclude()
return {digits(now_us), epoch}
