#!lua flags=no-writes
-- message: how does a message stand?
-- ARGV[1] message id
-- Returns: {} when it is not known, else: its result ('' while it has none), tenant, 'queued' | 'running' | 'ended', and of
--   its batch: id, queue, when it was created (ms), what history was told of it (JSON); '' where the batch is gone.
local id = ARGV[1]
local text, tenant, batch, state = call('GET', KEY.message .. id), nil, nil, 'ended'
if text then
  tenant, batch = string.match(text, '"tenant":"([^"]*)"'), string.match(text, '"batch_id":"([^"]*)"}$')
else
  local live = call('HMGET', KEY.live .. id, 'record', 'tenant', 'stream', 'entry')
  batch, tenant = string.match(live[1] or '', '^message (.+)$'), live[2]
  if not batch or call('EXISTS', KEY.batch .. batch) == 0 then return {} end -- staged, and never to be a job perhaps
  state = live[4] ~= '' and pending(live[3], group_of(live[3]), live[4]) and 'running' or 'queued'
end
local about = call('HMGET', KEY.batch .. (batch or ''), 'queue', 'created_ms', 'asked')
return {text or '', tenant or '', state, batch or '', about[1] or '', about[2] or '', about[3] or ''}
